package nbd

import (
	"context"
	"errors"
	"fmt"
)

// maxExports bounds what List returns.
const maxExports = 4096

// List returns what a server says of its exports. The target's own Export
// doesn't matter. A server may refuse to list them (ErrRefused). Exports that
// it says nothing of have a name only.
func List(ctx context.Context, t *Target, o *Options) ([]Info, error) {
	opts := o.filled()
	h, err := greet(ctx, t, opts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t, err)
	}
	ctx, cancel := context.WithTimeout(ctx, opts.HandshakeTimeout)
	defer cancel()
	var list []Info
	err = h.within(ctx, func() (err error) {
		list, err = h.list()
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", t, err), h.nc.Close())
	}
	return list, h.abort()
}

func (h *haggler) list() ([]Info, error) {
	if !h.fixed {
		return nil, fmt.Errorf("%w: the server is too old to list its exports", ErrRefused)
	}
	var names []string
	err := h.option(optList, nil, func(typ uint32, p []byte) error {
		if typ != repServer || len(p) < 4 || uint64(be.Uint32(p)) > uint64(len(p)-4) || be.Uint32(p) > maxString {
			return violation("option reply", "type", typ, "SERVER with a name of at most 4096 bytes")
		}
		if len(names) == maxExports {
			return violation("option reply", "exports", len(names)+1, fmt.Sprintf("at most %d", maxExports))
		}
		names = append(names, string(p[4:4+be.Uint32(p)]))
		return nil
	})
	if err != nil {
		return nil, err
	}
	tls := h.info.TLS
	structured, err := h.optional(optStructuredReply, nil, nil)
	if err != nil {
		return nil, err
	}
	list := make([]Info, 0, len(names))
	for _, name := range names {
		h.info = Info{Export: name, TLS: tls, Structured: structured, MinBlock: 1, PreferredBlock: 4096, MaxPayload: maxPayload}
		err := h.infoOption(optInfo, name)
		if refused := (*refusal)(nil); err != nil && !errors.As(err, &refused) {
			return nil, err
		}
		list = append(list, h.info)
	}
	return list, nil
}
