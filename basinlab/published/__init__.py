"""Published checkpoints, such as Stable Diffusion: scenarios, prompt lists, reference pictures, the comparison."""
