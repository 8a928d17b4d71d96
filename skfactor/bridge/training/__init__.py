"""Compression that takes part in training: one small protocol, one file for each method."""
# SPDX-License-Identifier: BSD-3-Clause
