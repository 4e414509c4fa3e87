"""Which blocks are where: records in LMDB environments. The only importer of lmdb."""
