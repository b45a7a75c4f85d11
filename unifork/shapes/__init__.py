"""The procedural demo world: scenes, their images, their texts, their rows, and an exact reader of images."""
