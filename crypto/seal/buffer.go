package seal

import (
	"io"
	"sync"
)

// maxPooled bounds what the pool may hold on to; longer buffers are left to
// the garbage collector.
const maxPooled = 1<<20 + TagSize

var scratchPool = sync.Pool{New: func() any { return new([]byte) }}

func getScratch(n int) *[]byte {
	p := scratchPool.Get().(*[]byte)
	if cap(*p) < n {
		*p = make([]byte, n)
	}
	*p = (*p)[:n]
	return p
}

func putScratch(p *[]byte) {
	if p != nil && cap(*p) <= maxPooled {
		scratchPool.Put(p)
	}
}

// grow extends dst by n bytes to head, and returns room of n+TagSize bytes to
// work in. If dst has to be allocated anew, the room is head's own end;
// otherwise it is scratch, because the AEAD writes the tag behind the text,
// where within dst's capacity other bytes of the caller's may lie.
func grow(dst []byte, n int) (head, room []byte, scratch *[]byte) {
	if cap(dst)-len(dst) >= n {
		scratch = getScratch(n + TagSize)
		return dst[:len(dst)+n], *scratch, scratch
	}
	all := make([]byte, len(dst)+n+TagSize)
	copy(all, dst)
	end := len(dst) + n
	return all[:end:end], all[len(dst):], nil
}

// fill reads a salt. The error of the random source is passed on: sealing
// without randomness must fail, not go on.
func fill(salt *[SaltSize]byte) error {
	d := derivedPool.Get().(*derived)
	defer derivedPool.Put(d)
	if _, err := io.ReadFull(randReader, d.info[:SaltSize]); err != nil {
		return err
	}
	copy(salt[:], d.info[:SaltSize])
	return nil
}
