//go:build (!amd64 && !arm64) || purego

package xts

const accelerated = false

type schedule struct{}

func (*schedule) expand([]byte)                                        {}
func (*schedule) crypt(_, _ []byte, _ uint64, _ int, _ uint64, _ bool) {}

func (*schedule) unit(_, _ []byte, _ *[BlockSize]byte, _ bool) {}
