"""Programs that measure: speed, memory, growth, and numbers beside those of the official code."""
