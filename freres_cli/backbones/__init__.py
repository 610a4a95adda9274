"""frames -> latents, and tokens -> answer: the only package that calls transformers."""
