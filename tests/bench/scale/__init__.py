"""Growth: the cost per user and the memory of every stage, at growing numbers of users."""
