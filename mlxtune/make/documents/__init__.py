"""Questions and answers out of documents, each kept only where the document says it."""
