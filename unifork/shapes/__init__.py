"""The procedural demo world: scenes, their pictures, their texts, their rows, and an exact reader of pictures."""
