"""SSBA: a sample-specific invisible trigger, trained and run in PyTorch."""
