"""From everything an experiment left on disk to one page that opens offline; nothing is computed twice or elsewhere."""
