"""Images from lists of URLs: which addresses may be contacted, how, and what becomes of every row."""
