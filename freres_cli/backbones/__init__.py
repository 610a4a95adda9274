"""frames -> latents, and tokens -> answer: the only place that calls transformers."""
