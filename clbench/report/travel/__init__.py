"""Results on their way elsewhere: submissions with flags and signatures, badges, parquet, Every Eval Ever."""
