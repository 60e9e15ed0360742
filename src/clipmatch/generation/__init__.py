"""Text-to-image generation: a vector-quantised autoencoder, and what paints with its codes.

The modules read in this order: `vqgan` and `taming` (the autoencoder, and where its weights come from), `pixelstore`
and `looptools` (pictures in, runs that stop and go on), `vqtrain`, `prior`, `priortrain`, then `attributes`, `judge`,
`generation_evaluation` and `demo_generate`.
"""
