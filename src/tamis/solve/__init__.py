"""Small dense problems in Gram form, solved in float64: which candidates, and with which weights."""
