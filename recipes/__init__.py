"""Vision and GAN recipes: auxiliary models that share the trainer."""
