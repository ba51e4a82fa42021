//go:build amd64 && !purego

#include "textflag.h"

// The polynomial of GF(2^128), as what each half of a tweak gets when the
// other's top bit moves out.
DATA poly<>+0(SB)/8, $0x87
DATA poly<>+8(SB)/8, $1
GLOBL poly<>(SB), RODATA|NOPTR, $16

// In all that follows: AX round keys, R10 rounds, DI dst, SI src.

// DOUBLE multiplies the tweak in X9 by x. X11 is poly, X10 is lost.
#define DOUBLE \
	VPSHUFD $0x13, X9, X10; \
	VPADDQ  X9, X9, X9; \
	VPSRAD  $31, X10, X10; \
	VPAND   X11, X10, X10; \
	VPXOR   X10, X9, X9

// TWEAK puts a tweak in its place for the batch after this one.
#define TWEAK(off) \
	VMOVDQU X9, off(R9); \
	DOUBLE

// ROUND8 does one round with the key at off for all eight blocks.
#define ROUND8(OP, off) \
	VMOVDQU off(AX), X8; \
	OP      X8, X0, X0; \
	OP      X8, X1, X1; \
	OP      X8, X2, X2; \
	OP      X8, X3, X3; \
	OP      X8, X4, X4; \
	OP      X8, X5, X5; \
	OP      X8, X6, X6; \
	OP      X8, X7, X7

#define IN(off, X) \
	VPXOR off(SI), X8, X; \
	VPXOR off(R8), X, X

#define OUT(LAST, off, X) \
	LAST    X8, X, X; \
	VPXOR   off(R8), X, X; \
	VMOVDQU X, off(DI)

// BATCHES is the body of encryptBatches and decryptBatches. The tweaks of the
// batch at work are at R8; those of the next are made at R9 between its
// rounds, from the chain or, at a sector's end, from the next sector's.
#define BATCHES(OP, LAST) \
	MOVQ    dst+0(FP), DI; \
	MOVQ    src+8(FP), SI; \
	MOVQ    tweaks+16(FP), DX; \
	MOVQ    sectors+24(FP), CX; \
	MOVQ    batches+32(FP), BX; \
	MOVQ    rk+40(FP), AX; \
	MOVQ    rounds+48(FP), R10; \
	MOVQ    R10, R12; \
	SHLQ    $4, R12; \
	ADDQ    AX, R12; \
	LEAQ    0(SP), R8; \
	LEAQ    128(SP), R9; \
	VMOVDQU poly<>(SB), X11; \
	VMOVDQU (DX), X9; \
	ADDQ    $16, DX; \
	MOVQ    BX, R11; \
	TWEAK(0); \
	TWEAK(16); \
	TWEAK(32); \
	TWEAK(48); \
	TWEAK(64); \
	TWEAK(80); \
	TWEAK(96); \
	TWEAK(112); \
loop: \
	XCHGQ   R8, R9; \
	DECQ    R11; \
	JNZ     start; \
	VMOVDQU (DX), X9; \
	ADDQ    $16, DX; \
	MOVQ    BX, R11; \
	DECQ    CX; \
start: \
	VMOVDQU (AX), X8; \
	IN(0, X0); \
	IN(16, X1); \
	IN(32, X2); \
	IN(48, X3); \
	IN(64, X4); \
	IN(80, X5); \
	IN(96, X6); \
	IN(112, X7); \
	ROUND8(OP, 16); \
	TWEAK(0); \
	ROUND8(OP, 32); \
	TWEAK(16); \
	ROUND8(OP, 48); \
	TWEAK(32); \
	ROUND8(OP, 64); \
	TWEAK(48); \
	ROUND8(OP, 80); \
	TWEAK(64); \
	ROUND8(OP, 96); \
	TWEAK(80); \
	ROUND8(OP, 112); \
	TWEAK(96); \
	ROUND8(OP, 128); \
	TWEAK(112); \
	ROUND8(OP, 144); \
	CMPQ    R10, $12; \
	JB      last; \
	ROUND8(OP, 160); \
	ROUND8(OP, 176); \
	JE      last; \
	ROUND8(OP, 192); \
	ROUND8(OP, 208); \
last: \
	VMOVDQU (R12), X8; \
	OUT(LAST, 0, X0); \
	OUT(LAST, 16, X1); \
	OUT(LAST, 32, X2); \
	OUT(LAST, 48, X3); \
	OUT(LAST, 64, X4); \
	OUT(LAST, 80, X5); \
	OUT(LAST, 96, X6); \
	OUT(LAST, 112, X7); \
	ADDQ    $128, SI; \
	ADDQ    $128, DI; \
	TESTQ   CX, CX; \
	JNZ     loop; \
	RET

// BLOCKS is the body of encryptBlocks and decryptBlocks: one block at a time.
#define BLOCKS(OP, LAST) \
	MOVQ    dst+0(FP), DI; \
	MOVQ    src+8(FP), SI; \
	MOVQ    tweak+16(FP), DX; \
	MOVQ    blocks+24(FP), CX; \
	MOVQ    rk+32(FP), AX; \
	MOVQ    rounds+40(FP), R10; \
	VMOVDQU poly<>(SB), X11; \
	VMOVDQU (DX), X9; \
block: \
	VPXOR   (SI), X9, X0; \
	VPXOR   (AX), X0, X0; \
	LEAQ    16(AX), R12; \
	LEAQ    -1(R10), R11; \
round: \
	OP      (R12), X0, X0; \
	ADDQ    $16, R12; \
	DECQ    R11; \
	JNZ     round; \
	LAST    (R12), X0, X0; \
	VPXOR   X9, X0, X0; \
	VMOVDQU X0, (DI); \
	DOUBLE; \
	ADDQ    $16, SI; \
	ADDQ    $16, DI; \
	DECQ    CX; \
	JNZ     block; \
	VMOVDQU X9, (DX); \
	RET

// func encryptBatches(dst, src, tweaks *byte, sectors, batches int, rk *byte, rounds int)
TEXT ·encryptBatches(SB), NOSPLIT, $256-56
	BATCHES(VAESENC, VAESENCLAST)

// func decryptBatches(dst, src, tweaks *byte, sectors, batches int, rk *byte, rounds int)
TEXT ·decryptBatches(SB), NOSPLIT, $256-56
	BATCHES(VAESDEC, VAESDECLAST)

// func encryptBlocks(dst, src, tweak *byte, blocks int, rk *byte, rounds int)
TEXT ·encryptBlocks(SB), NOSPLIT, $0-48
	BLOCKS(VAESENC, VAESENCLAST)

// func decryptBlocks(dst, src, tweak *byte, blocks int, rk *byte, rounds int)
TEXT ·decryptBlocks(SB), NOSPLIT, $0-48
	BLOCKS(VAESDEC, VAESDECLAST)

// func encrypt8(buf, rk *byte, rounds int)
TEXT ·encrypt8(SB), NOSPLIT, $0-24
	MOVQ    buf+0(FP), DI
	MOVQ    rk+8(FP), AX
	MOVQ    rounds+16(FP), R10
	VMOVDQU (AX), X8
	VPXOR   0(DI), X8, X0
	VPXOR   16(DI), X8, X1
	VPXOR   32(DI), X8, X2
	VPXOR   48(DI), X8, X3
	VPXOR   64(DI), X8, X4
	VPXOR   80(DI), X8, X5
	VPXOR   96(DI), X8, X6
	VPXOR   112(DI), X8, X7
	DECQ    R10

round8:
	ADDQ $16, AX
	ROUND8(VAESENC, 0)
	DECQ R10
	JNZ  round8
	ADDQ $16, AX
	ROUND8(VAESENCLAST, 0)
	VMOVDQU X0, 0(DI)
	VMOVDQU X1, 16(DI)
	VMOVDQU X2, 32(DI)
	VMOVDQU X3, 48(DI)
	VMOVDQU X4, 64(DI)
	VMOVDQU X5, 80(DI)
	VMOVDQU X6, 96(DI)
	VMOVDQU X7, 112(DI)
	RET

// func subWord(w uint32) uint32
// With the same word in every column, ShiftRows changes nothing.
TEXT ·subWord(SB), NOSPLIT, $0-12
	MOVL        w+0(FP), AX
	VMOVD       AX, X0
	VPSHUFD     $0, X0, X0
	VPXOR       X1, X1, X1
	VAESENCLAST X1, X0, X0
	VMOVD       X0, AX
	MOVL        AX, ret+8(FP)
	RET

// func invMixColumns(dst, src *byte)
TEXT ·invMixColumns(SB), NOSPLIT, $0-16
	MOVQ    dst+0(FP), DI
	MOVQ    src+8(FP), SI
	VMOVDQU (SI), X0
	VAESIMC X0, X0
	VMOVDQU X0, (DI)
	RET
