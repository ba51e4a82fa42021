package ipz

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	o, ok := l.byRecords()
	if !ok {
		o.Add("format", Name)
		n := len(image)
		for n > 0 && image[n-1] == image[len(image)-1] {
			n--
		}
		o.Add("image", form.Hex(image[:n]))
		o.Add("size", len(image))
		o.Add("fill", spec.Byte(image[len(image)-1]))
	}
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems()), nil
}

// byRecords is a spec by records, which says all of an image, or it is no good.
// Records that overlap could be many times as long as the image.
func (l *layout) byRecords() (o spec.Object, ok bool) {
	if len(l.overlaps()) > 0 {
		return nil, false
	}
	o = l.form()
	if again, err := packImage(o); err != nil || !bytes.Equal(again, l.image) {
		return nil, false
	}
	return o, true
}

func (l *layout) form() spec.Object {
	var o, header, toc spec.Object
	o.Add("format", Name)
	head := l.image[headerOffset:min(headerEnd, len(l.image))]
	header.Add("version", spec.Show(l.image[24:26]))
	addFrame(&header, head)
	if ecc := l.image[:headerOffset]; len(bytes.Trim(ecc, "\x00")) > 0 {
		addECC(&header, ecc, head)
	}
	o.Add("header", header)
	toc.Add("type", l.toc.typ)
	if l.toc.off != headerEnd {
		toc.Add("offset", l.toc.off)
	}
	keywords, _ := readKeywords(l.toc.data())
	if n := len(keywords); n > 0 && keywords[n-1].name == "PF" {
		toc.Add("padding", form.Hex(keywords[n-1].value))
	}
	addFrame(&toc, l.toc.raw)
	l.toc.addECC(&toc)
	o.Add("toc", toc)
	list := []spec.Object{}
	next := l.toc.off + l.toc.size
	for i := range l.records {
		r := &l.records[i]
		list = append(list, r.form(next))
		next = r.off + r.size
	}
	o.Add("records", list)
	l.addGaps(&o)
	return o
}

// addFrame writes tag and end if they aren't what they should be.
func addFrame(o *spec.Object, raw []byte) {
	if len(raw) < frame {
		return
	}
	if raw[0] != tagRecord {
		o.Add("tag", spec.Byte(raw[0]))
	}
	if end := raw[len(raw)-1]; end != tagEnd {
		o.Add("end", spec.Byte(end))
	}
}

func addECC(o *spec.Object, ecc, raw []byte) {
	o.Add("ecc", form.Hex(ecc))
	sum := sha256.Sum256(raw)
	o.Add("protects", hex.EncodeToString(sum[:]))
}

func (r *record) addECC(o *spec.Object) {
	if r.eccOff != 0 {
		o.Add("ecc_offset", r.eccOff)
	}
	if r.eccLen > 0 && r.inside {
		addECC(o, r.ecc, r.raw)
	}
}

// form is a record's text form; next is where it lies if it follows the one in
// front.
func (r *record) form(next int) spec.Object {
	var o spec.Object
	o.Add("name", r.name)
	if r.typ != 0 {
		o.Add("type", r.typ)
	}
	if r.off != next {
		o.Add("offset", r.off)
	}
	if keywords, ok := r.plain(); ok {
		o.Add("keywords", keywords)
		addFrame(&o, r.raw)
	} else {
		o.Add("raw", form.Hex(r.raw))
	}
	r.addECC(&o)
	return o
}

// plain is the keywords of a record that is made of them, behind RT.
func (r *record) plain() (keywords spec.Object, ok bool) {
	keywords = spec.Object{}
	list, fail := readKeywords(r.data())
	if fail != "" || !r.named() || int(binary.LittleEndian.Uint16(r.raw[1:])) != len(r.raw)-frame {
		return nil, false
	}
	seen := map[string]bool{"RT": true}
	for _, k := range list[1:] {
		if seen[k.name] || !spec.IsText([]byte(k.name)) {
			return nil, false
		}
		seen[k.name] = true
		keywords.Add(k.name, spec.Show(k.value))
	}
	return keywords, true
}

// addGaps writes what belongs to nothing and isn't fill, and size and fill.
func (l *layout) addGaps(o *spec.Object) {
	list := []spec.Object{}
	fill, end := byte(0), 0
	pieces := l.pieces()
	for _, p := range pieces {
		end = max(end, p.off+p.size)
	}
	rest := l.image[end:]
	n := len(rest)
	if n > 0 {
		fill = rest[n-1]
		for n > 0 && rest[n-1] == fill {
			n--
		}
	}
	gap := func(off, end int) {
		if end > off && bytes.Count(l.image[off:end], []byte{fill}) < end-off {
			var g spec.Object
			g.Add("offset", fmt.Sprintf("%#x", off))
			g.Add("data", form.Hex(l.image[off:end]))
			list = append(list, g)
		}
	}
	pos := 0
	for _, p := range pieces {
		gap(pos, p.off)
		pos = max(pos, p.off+p.size)
	}
	gap(pos, pos+n)
	if len(list) > 0 {
		o.Add("gaps", list)
	}
	if len(rest) > 0 {
		o.Add("size", len(l.image))
	}
	if fill != 0 {
		o.Add("fill", spec.Byte(fill))
	}
}
