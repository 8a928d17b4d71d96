"""What is stored: decoders, `CompressedTensor`, entropy coders, the file."""
# SPDX-License-Identifier: BSD-3-Clause
