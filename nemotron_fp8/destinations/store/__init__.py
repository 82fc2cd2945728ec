"""A folder of an object store as destination."""
