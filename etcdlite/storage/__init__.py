"""The store on disk: records in segments, the index over them, checkpoints."""
