"""What the papers look at inside a model: alignment and gradient conflict by layer, entropy of its tokens; no Ray."""
