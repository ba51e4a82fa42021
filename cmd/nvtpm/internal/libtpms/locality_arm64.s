#include "textflag.h"

// int localityC(uint32_t *locality, uint32_t tpm), in the convention of
// AAPCS64: it needs the arguments' registers, R2 and R3.
TEXT ·localityC(SB), NOSPLIT|NOFRAME, $0-0
	MOVD $·locality(SB), R2
	MOVWU (R2), R3
	MOVW R3, (R0)
	MOVD $0, R0
	RET

DATA ·localityPC(SB)/8, $·localityC(SB)
GLOBL ·localityPC(SB), NOPTR|RODATA, $8
