"""Local copies of public benchmarks, in their own layouts -> questions; knows no model, no torch."""
