"""The protocols that clients and members speak, sans-IO."""
