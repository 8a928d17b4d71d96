"""Pure numerics: arrays in, a NamedTuple of arrays out."""
# SPDX-License-Identifier: BSD-3-Clause
