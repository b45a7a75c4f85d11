"""Files that exist only when they are whole: manifests, stores, jobs over shards, schemas, repair."""
