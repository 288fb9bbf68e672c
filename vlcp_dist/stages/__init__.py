"""The steps of the pipeline. They meet on storage only: each reads the files of the ones before it."""
