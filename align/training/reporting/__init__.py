"""A preference run's logs, its sample images and its report."""
