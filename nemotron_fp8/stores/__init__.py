"""Object stores: S3 and stores that speak its protocol, Google Cloud Storage and Azure Blob Storage."""
