"""Sources of samples, their formats, the token cache and the resumable loader."""
