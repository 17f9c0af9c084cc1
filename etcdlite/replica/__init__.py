"""The replicated state machine: what committed entries change, and what reads see."""
