"""From a model's pictures and answers to scores with error bars and chance levels; no Ray."""
