"""What the numbered steps share. Nothing here parses arguments, seeds a generator or loads a model when imported."""
