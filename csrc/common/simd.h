// Run-time choice of the instruction set, per function: one build serves every x86-64 CPU.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(PRMFAST_NO_TARGET_CLONES)
#define PRMFAST_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PRMFAST_MULTIVERSION
#endif
