package ubootenv

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// copyMembers are those that a copy may have, and instead of it the spec; crc
// is the last.
var copyMembers = []string{"variables", "entries", "data", "rest", "pad", "crc"}

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", append([]string{"format", "env_size", "redundant", "copies", "patches", "size", "fill"}, copyMembers...)...); err != nil {
		return nil, nil, err
	}
	size, err := envSize(o)
	if err != nil {
		return nil, nil, err
	}
	envs, err := buildCopies(o, size)
	if err != nil {
		return nil, nil, err
	}
	image, err := place(o, envs)
	if err != nil {
		return nil, nil, err
	}
	l, err := scan(image)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be an environment: %v", err)
	}
	return image, form.Warnings(l.problems()), nil
}

// envSize is the size of one copy.
func envSize(o spec.Object) (int, error) {
	raw, ok := o.Get("env_size")
	if !ok {
		return 0, spec.Errorf("env_size", "missing: U-Boot's CONFIG_ENV_SIZE, such as \"0x2000\"")
	}
	n, err := spec.Uint("env_size", raw, MaxSize)
	if err == nil && n < crcSize+minData {
		err = spec.Errorf("env_size", "%d, want at least %d", n, crcSize+minData)
	}
	return int(n), err
}

// buildCopies makes the copies that a spec has.
func buildCopies(o spec.Object, size int) ([]env, error) {
	flagged := false
	if raw, ok := o.Get("redundant"); ok {
		var err error
		if flagged, err = spec.Bool("redundant", raw); err != nil {
			return nil, err
		}
	}
	raw, given := o.Get("copies")
	if !flagged {
		if given {
			return nil, spec.Errorf("copies", "needs \"redundant\": true")
		}
		e, err := build("", o, env{size: size})
		return []env{e}, err
	}
	list := []json.RawMessage{json.RawMessage(`{"flag": 1}`)}
	if given {
		if err := json.Unmarshal(raw, &list); err != nil || len(list) < 1 || len(list) > 2 {
			return nil, spec.Errorf("copies", "want a list of one or two")
		}
	}
	var envs []env
	at, used := 0, false
	for i, raw := range list {
		e, inherits, err := buildCopy(o, copyName(i), raw, env{off: at, size: size, flagged: true})
		if err != nil {
			return nil, err
		}
		used = used || inherits
		if e.off < at {
			return nil, spec.Errorf(copyName(i)+".offset", "%#x, want at least %#x", e.off, at)
		}
		at = e.end()
		envs = append(envs, e)
	}
	for _, m := range o {
		if slices.Contains(copyMembers, m.Name) && (!used || m.Name == "crc") {
			return nil, spec.Errorf(m.Name, "belongs into one of the copies")
		}
	}
	return envs, nil
}

// buildCopy makes a copy of a list's element. If that has no content, it
// inherits the spec's.
func buildCopy(o spec.Object, path string, raw json.RawMessage, e env) (_ env, inherits bool, err error) {
	own, err := spec.ParseObject(path, raw)
	if err != nil {
		return e, false, err
	}
	if err := own.Only(path, append([]string{"flag", "offset"}, copyMembers...)...); err != nil {
		return e, false, err
	}
	off, err := form.Uint(own, path, "offset", MaxSize, uint64(e.off))
	if err != nil {
		return e, false, err
	}
	e.off = int(off)
	flag, err := form.Uint(own, path, "flag", 0xff, 1)
	if err != nil {
		return e, false, err
	}
	content := copyMembers[:len(copyMembers)-1] // without crc
	if !slices.ContainsFunc(own, func(m spec.Member) bool { return slices.Contains(content, m.Name) }) {
		inherits = true
		for _, m := range o {
			if slices.Contains(content, m.Name) {
				own = append(own, m)
			}
		}
	}
	if e, err = build(path, own, e); err == nil {
		e.block[crcSize] = byte(flag)
	}
	return e, inherits, err
}

// build makes a copy's bytes.
func build(path string, o spec.Object, e env) (env, error) {
	data, err := buildData(path, o, e.size-e.header())
	if err != nil {
		return e, err
	}
	e.block = append(make([]byte, e.header()), data...)
	crc, err := form.Uint(o, path, "crc", 1<<32-1, uint64(crc32.ChecksumIEEE(data)))
	binary.LittleEndian.PutUint32(e.block, uint32(crc))
	return e, err
}

// buildData makes what is behind CRC and flag, of size bytes.
func buildData(path string, o spec.Object, size int) ([]byte, error) {
	if raw, ok := o.Get("data"); ok {
		for _, name := range []string{"variables", "entries", "rest", "pad"} {
			if _, both := o.Get(name); both {
				return nil, spec.Errorf(spec.Join(path, name), "can't be beside data")
			}
		}
		v, err := spec.ParseValue(spec.Join(path, "data"), raw, size)
		if err == nil && len(v.Bytes) != size {
			err = spec.Errorf(spec.Join(path, "data"), "%d bytes, want %d", len(v.Bytes), size)
		}
		return v.Bytes, err
	}
	entries, err := buildEntries(path, o, size)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, size)
	for _, b := range entries {
		out = append(append(out, b...), 0)
	}
	rest, err := form.Bytes(o, path, "rest", size)
	if err != nil {
		return nil, err
	}
	out = append(append(out, 0), rest...)
	if len(out) > size {
		return nil, spec.Errorf(path, "the variables take %d bytes, and the environment has %d for them", len(out), size)
	}
	pad, err := form.Uint(o, path, "pad", 0xff, defaultFill)
	return append(out, bytes.Repeat([]byte{byte(pad)}, size-len(out))...), err
}

// buildEntries makes the entries, without their zero bytes. All together have
// at most limit bytes.
func buildEntries(path string, o spec.Object, limit int) (list [][]byte, err error) {
	total := 0
	add := func(path string, b []byte) error {
		if bytes.IndexByte(b, 0) >= 0 || len(b) == 0 {
			return spec.Errorf(path, "is empty, or has a zero byte, which ends it")
		}
		if total += len(b) + 1; total > limit {
			return spec.Errorf(path, "the variables take more than %d bytes", limit)
		}
		list = append(list, b)
		return nil
	}
	variables, hasVariables := o.Get("variables")
	if _, hasEntries := o.Get("entries"); hasEntries {
		if hasVariables {
			return nil, spec.Errorf(spec.Join(path, "entries"), "can't be beside variables")
		}
		raws, err := form.List(o, path, "entries", limit)
		if err != nil {
			return nil, err
		}
		for i, raw := range raws {
			where := fmt.Sprintf("%s[%d]", spec.Join(path, "entries"), i)
			v, err := spec.ParseValue(where, raw, limit)
			if err != nil {
				return nil, err
			}
			if err := add(where, v.Bytes); err != nil {
				return nil, err
			}
		}
		return list, nil
	}
	if !hasVariables {
		return nil, nil
	}
	path = spec.Join(path, "variables")
	named, err := spec.ParseObject(path, variables)
	if err != nil {
		return nil, err
	}
	for _, m := range named {
		where := spec.Join(path, m.Name)
		if m.Name == "" || strings.ContainsRune(m.Name, '=') {
			return nil, spec.Errorf(where, "a variable's name is not empty and has no =")
		}
		v, err := spec.ParseValue(where, m.Value, limit)
		if err != nil {
			return nil, err
		}
		if err := add(where, append([]byte(m.Name+"="), v.Bytes...)); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// place puts the copies into the image.
func place(o spec.Object, envs []env) ([]byte, error) {
	end := envs[len(envs)-1].end()
	size, err := form.Uint(o, "", "size", MaxSize, uint64(end))
	if err != nil {
		return nil, err
	}
	if end > MaxSize || int(size) < end {
		return nil, spec.Errorf("size", "%d, and the environment ends at %d", size, end)
	}
	fill, err := form.Uint(o, "", "fill", 0xff, defaultFill)
	if err != nil {
		return nil, err
	}
	image := bytes.Repeat([]byte{byte(fill)}, int(size))
	if err := form.ApplyPatches(o, image); err != nil {
		return nil, err
	}
	for _, e := range envs {
		copy(image[e.off:], e.block)
	}
	return image, nil
}
