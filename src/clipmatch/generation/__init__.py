"""Text-to-image generation, guided by a model: sentences -> pictures.

The modules read in this order: `prompts` (what is asked), `cutouts` and `guide` (how well a picture shows it), `canvas`
and `biggan` (latents -> pictures), `optimise` (latents that show it better), `picture` (files).
"""
