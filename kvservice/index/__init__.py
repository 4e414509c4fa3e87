"""Which blocks are where: records in two LMDB environments. The only importer of lmdb."""
