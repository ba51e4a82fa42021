package nvstore

import (
	"bytes"
	"errors"
	"io"

	"nvstore.dev/blobdir"
	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/pebbledev"
	"nvstore.dev/machine"
)

// A Place says where in an image the store lies.
type Place int

const (
	// Found is the zero value: where the mark in the header of a qcow2
	// image says, which only nvtool writes. Of an image without one (a raw
	// one, a copy, an overlay), it is the tail if there is a layout record
	// at the end and no store at the start, and the whole without such a
	// record. Both are ErrAmbiguous: a guest can write a store's header to
	// its disk, and what is stored in a blob may be such a record.
	Found Place = iota
	// Whole is from the first byte on.
	Whole
	// Tail is the state window of a machine's disk (package machine).
	Tail
)

// Locate returns the device that the store lies on: dev, or the state window
// of the machine's disk that dev is, whose closing closes dev.
func Locate(dev image.Device, place Place) (image.Device, error) {
	switch place {
	case Whole:
		return dev, nil
	case Tail:
		return tail(dev)
	}
	switch mark := chain.MarkOf(dev); {
	case mark == chain.MarkStore:
		return dev, nil
	case mark == chain.MarkMachine:
		return tail(dev)
	case mark != chain.Unmarked:
		return nil, ErrAdopting
	}
	if _, ok := image.As[*pebbledev.Device](dev); ok {
		return dev, nil
	}
	w, err := tail(dev)
	if errors.Is(err, machine.ErrNoLayout) {
		return dev, nil
	}
	if err != nil {
		return nil, err
	}
	switch store, err := recognize(dev); {
	case err != nil:
		return nil, err
	case store:
		return nil, ErrAmbiguous
	}
	return w, nil
}

// recognize tells whether a store begins at the first byte of dev: whether
// there is a header, or a root in either slot.
func recognize(dev image.Device) (bool, error) {
	p := make([]byte, len(blobdir.Magic))
	if n, err := dev.ReadAt(p, 0); err != nil && err != io.EOF {
		return false, err
	} else if bytes.Equal(p[:n], blobdir.Magic) {
		return true, nil
	}
	_, err := blobdir.Open(keptOpen{dev}, &blobdir.Options{ReadOnly: true, Keyless: true})
	e := (*blobdir.Error)(nil)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, io.ErrUnexpectedEOF):
		return false, nil // there is no room for one
	case !errors.As(err, &e):
		return false, err
	}
	// R12 and R13 are about roots that aren't there or aren't readable.
	return e.Kind != blobdir.ErrFormat && e.Rule != "R12" && e.Rule != "R13", nil
}

func tail(dev image.Device) (image.Device, error) {
	d, err := machine.Open(dev)
	if err != nil {
		return nil, err
	}
	return d.State()
}
