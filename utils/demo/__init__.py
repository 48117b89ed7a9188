"""The embedded demo: a little world of questions (world), its exact judge (judge) and a small model (tiny_model)."""
