"""Image sources, decoding and cropping, and the sampler that makes a run a function of (config, seed)."""
