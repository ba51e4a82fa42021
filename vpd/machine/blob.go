package machine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/bits"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/formats"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// make makes the blob of a machine.
func (e *entry) make(s *scope, o *Options) (*Blob, error) {
	b := &Blob{Name: e.name}
	if raw, ok := e.o.Get("values"); ok {
		list, err := parseValues(e.path+".values", raw)
		if err != nil {
			return nil, err
		}
		if s, err = s.with(e.path+".values", list); err != nil {
			return nil, err
		}
	}
	if err := e.content(b, s, o); err != nil {
		return nil, err
	}
	if err := e.fill(b); err != nil {
		return nil, err
	}
	if err := e.describe(b, s); err != nil {
		return nil, err
	}
	return b, nil
}

func (e *entry) content(b *Blob, s *scope, o *Options) error {
	n := 0
	for _, m := range e.o {
		var err error
		path := e.path + "." + m.Name
		switch m.Name {
		case "spec":
			err = e.spec(path, m.Value, b, s, o)
		case "template":
			var name string
			if name, err = spec.String(path, m.Value); err != nil {
				break
			}
			t := blobTemplate(name)
			if t == nil {
				return spec.Errorf(path, "no template %q of a blob; nvtool vpd template ls lists them", name)
			}
			err = pack(path, t, b, s)
		case "file":
			b.Content, err = readFile(path, m.Value, s, o)
			if f := formats.Detect(b.Content); err == nil && f != nil {
				b.Type = typeOf(f)
			}
		default:
			continue
		}
		if err != nil {
			return err
		}
		n++
	}
	_, sized := e.o.Get("size")
	if n > 1 || n == 0 && !sized {
		return spec.Errorf(e.path, "want one of spec, file and template; or a size alone, for a blank memory")
	}
	return nil
}

func typeOf(f vpd.Format) string { return "vpd/" + f.Name() }

func (e *entry) spec(path string, raw json.RawMessage, b *Blob, s *scope, o *Options) error {
	if len(raw) > 0 && raw[0] == '"' {
		text, err := readFile(path, raw, s, o)
		if err != nil {
			return err
		}
		return pack(path, text, b, s)
	}
	return pack(path, raw, b, s)
}

// pack makes an image of a spec that has values in it.
func pack(path string, text []byte, b *Blob, s *scope) error {
	inside := func(err error) error {
		var se *vpd.SpecError
		if errors.As(err, &se) && se.Path != "" {
			return spec.Errorf(spec.Join(path, se.Path), "%s", se.Msg)
		} else if se != nil {
			return spec.Errorf(path, "%s", se.Msg)
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	whole, err := spec.Read(text)
	if err != nil {
		return inside(err)
	}
	std, err := whole.MarshalJSON()
	if err != nil {
		return inside(err)
	}
	std, err = s.expandAll(path, std)
	if err != nil {
		return err
	}
	f, err := formats.OfSpec(std)
	if err != nil {
		return inside(err)
	}
	if b.Content, b.Warnings, err = f.Pack(std); err != nil {
		return inside(err)
	}
	b.Type = typeOf(f)
	return nil
}

func readFile(path string, raw json.RawMessage, s *scope, o *Options) ([]byte, error) {
	name, err := spec.String(path, raw)
	if err != nil {
		return nil, err
	}
	if name, err = s.expand(path, name); err != nil {
		return nil, err
	}
	if o.ReadFile == nil {
		return nil, spec.Errorf(path, "no files are read here")
	}
	p, err := o.ReadFile(name, maxSize)
	if err != nil {
		return nil, fmt.Errorf("spec: %s: %w", path, err)
	}
	return p, nil
}

// fill fills up to the size.
func (e *entry) fill(b *Blob) error {
	fill, err := form.Uint(e.o, e.path, "fill", 0xff, 0xff)
	if err != nil {
		return err
	}
	raw, ok := e.o.Get("size")
	if !ok {
		if _, filled := e.o.Get("fill"); filled {
			return spec.Errorf(e.path+".fill", "needs a size")
		}
		return nil
	}
	var size int64
	if string(raw) == `"eeprom"` {
		size = int64(max(256, 1<<bits.Len(uint(max(len(b.Content), 1)-1))))
	} else if size, err = bytesOf(e.path+".size", raw, maxSize); err != nil {
		return err
	}
	if int64(len(b.Content)) > size {
		return spec.Errorf(e.path+".size", "%d, and the content has %d bytes", size, len(b.Content))
	}
	b.Content = append(b.Content, bytes.Repeat([]byte{byte(fill)}, int(size)-len(b.Content))...)
	return nil
}

// describe sets what the store says of the blob.
func (e *entry) describe(b *Blob, s *scope) error {
	text := func(path string, raw json.RawMessage) (string, error) {
		t, err := spec.String(path, raw)
		if err != nil {
			return "", err
		}
		return s.expand(path, t)
	}
	var err error
	for name, to := range map[string]*bool{"live": &b.Live, "plain": &b.Plain} {
		if raw, ok := e.o.Get(name); ok {
			if *to, err = spec.Bool(e.path+"."+name, raw); err != nil {
				return err
			}
		}
	}
	if _, said := e.o.Get("plain"); said && !b.Live {
		return spec.Errorf(e.path+".plain", "goes with live")
	}
	if raw, ok := e.o.Get("type"); ok {
		if b.Type, err = text(e.path+".type", raw); err != nil {
			return err
		}
	}
	if raw, ok := e.o.Get("about"); ok {
		about, err := text(e.path+".about", raw)
		if err != nil {
			return err
		}
		b.Attributes = append(b.Attributes, [2]string{"about", about})
	}
	raw, ok := e.o.Get("attributes")
	if !ok {
		return nil
	}
	o, err := spec.ParseObject(e.path+".attributes", raw)
	if err != nil {
		return err
	}
	for _, m := range o {
		v, err := text(e.path+".attributes."+m.Name, m.Value)
		if err != nil {
			return err
		}
		b.Attributes = append(b.Attributes, [2]string{m.Name, v})
	}
	return nil
}
