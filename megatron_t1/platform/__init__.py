"""What we run on: CPU (gloo) or CUDA (NCCL), which accelerations are installed, and the CPU's stand-ins for CUDA."""
