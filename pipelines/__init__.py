"""One thin program per stage of `dvc.yaml`: read the configuration, call the library, say what was done."""
