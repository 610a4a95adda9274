"""latents -> tracks -> tokens: the Fre-Res method as pure tensor code."""
