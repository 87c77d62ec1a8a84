"""The paper's benchmarks as downloaded, made into raw datasets of nnU-Net."""
