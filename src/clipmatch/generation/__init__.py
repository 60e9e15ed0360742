"""Text-to-image generation, guided by a model: sentences -> pictures.

The modules read in this order: `prompts` (what is asked), `cutouts` and `guide` (how well a picture shows it), `vqgan`
and `taming` (pictures <-> codes), `canvas` and `biggan` (latents -> pictures), `optimise` (latents that show it
better), `picture` (files), `pixelstore`, `looptools`, `perceptual` and `vqtrain` (a VQGAN learns), `prior` and
`priortrain` (a sentence's embedding -> codes), `painter` (the whole way), then the small world of drawn scenes:
`demo_generate`, and how it is measured: `generation_evaluation`, `attributes`, `judge`, `demo_evaluation`.
"""
