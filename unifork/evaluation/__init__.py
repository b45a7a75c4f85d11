"""From a model's images and answers to scores with error bars and chance levels; no Ray."""
