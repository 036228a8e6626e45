"""Many engines as Ray actors. Nothing else imports Ray."""
