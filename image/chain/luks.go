package chain

import (
	"errors"
	"fmt"

	"nvstore.dev/image"
	"nvstore.dev/image/luks"
)

var (
	// ErrSecret: a layer is encrypted, and there is no passphrase for it.
	ErrSecret = errors.New("an encrypted layer needs a secret")
	// ErrPlain: a layer should be encrypted, and isn't.
	ErrPlain = errors.New("the layer isn't encrypted")
)

// takeLUKS reads a luks driver's own options and returns the rest.
func (n *node) takeLUKS(location, prefix string, own map[string]string, depth int) (map[string]string, error) {
	var err error
	if n.secret, err = take(location, prefix, own, "key-secret", false); err != nil {
		return nil, err
	}
	own, head := splitChild(own, "header.")
	if len(head) > 0 {
		n.header, err = parseNode(location, prefix+"header.", head, depth+1)
	}
	return own, err
}

// unnamed counts the layers whose secret has no name.
func (n *node) unnamed() int {
	if n == nil {
		return 0
	}
	count := n.child.unnamed() + n.header.unnamed() + n.backing.unnamed() + n.data.unnamed()
	if (n.driver == LUKS || n.encrypt != "") && n.secret == "" {
		count++
	}
	return count
}

// stackLUKS takes file over. A detached header is needed for opening alone,
// and may be shared by several payloads.
func (n *node) stackLUKS(file image.Device, o *Options) (dev image.Device, err error) {
	var header image.Device
	defer func() {
		if header != nil {
			err = errors.Join(err, header.Close())
		}
		if err != nil {
			dev, err = nil, errors.Join(err, file.Close())
		}
	}()
	if n.header != nil {
		h := *o
		h.ReadOnly = true
		if header, err = n.header.open(&h); err != nil {
			return nil, fmt.Errorf("LUKS header: %w", err)
		}
	}
	pass, err := o.secret(n.secret, n.child.name())
	if err != nil {
		return nil, err
	}
	defer clear(pass)
	d, err := luks.Open(file, &luks.Options{Passphrase: pass, Header: header, ReadOnly: o.ReadOnly, Budget: o.Budget, Path: n.child.path})
	if err != nil {
		return nil, &layerError{n.child.name(), err}
	}
	return d, nil
}

// name is the file that a node comes from, for messages.
func (n *node) name() string {
	for ; n != nil; n = n.child {
		if n.path != "" {
			return n.path
		}
	}
	return ""
}

// A layerError puts the name of a layer's file in front of an error that
// doesn't have it.
type layerError struct {
	name string
	err  error
}

func (e *layerError) Error() string {
	if f := (*image.FormatError)(nil); e.name == "" || errors.As(e.err, &f) && f.Path != "" {
		return e.err.Error()
	}
	return e.name + ": " + e.err.Error()
}

func (e *layerError) Unwrap() error { return e.err }

// KeySecret returns the name that a location gives the secret of its topmost
// layer; "" if it gives none, or makes no sense.
func KeySecret(location string) string {
	n, err := parse(location)
	if err != nil {
		return ""
	}
	return n.secret
}

// secret asks for a layer's passphrase.
func (o *Options) secret(name, layer string) ([]byte, error) {
	var pass []byte
	var err error
	if o.Secret != nil {
		pass, err = o.Secret(name)
	}
	if err == nil && len(pass) == 0 {
		err = ErrSecret
		if name != "" {
			err = fmt.Errorf("key-secret %q: %w", name, ErrSecret)
		}
	}
	if err != nil {
		return nil, &layerError{layer, err}
	}
	return pass, nil
}
