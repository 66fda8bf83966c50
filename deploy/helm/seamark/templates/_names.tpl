{{/* Names, labels and addresses. What reads only .Release and .Values.global is called from the NATS chart, too. */}}

{{- define "seamark.name" -}}
{{- if contains "seamark" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-seamark" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Labels of an object. (root, component) */}}
{{- define "seamark.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{ include "seamark.selector" . }}
{{- end }}

{{/* What never changes, so selectors may hold it. (root, component) */}}
{{- define "seamark.selector" -}}
app.kubernetes.io/name: seamark
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* (root, tag: of this role alone, or empty) */}}
{{- define "seamark.image" -}}
{{- $image := .root.Values.global.seamark.image -}}
{{- if .tag }}{{ $image.repository }}:{{ .tag }}{{ else if $image.digest }}{{ $image.repository }}@{{ $image.digest }}{{ else }}{{ $image.repository }}:{{ $image.tag }}{{ end }}
{{- end }}

{{/* What the NATS chart calls its StatefulSet. The schema takes its own names away, so that this is the whole rule. */}}
{{- define "seamark.nats.name" -}}
{{- if contains "nats" .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}{{ else }}{{ printf "%s-nats" .Release.Name | trunc 63 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Addresses of one server each, separated by commas. (root, scheme, port) */}}
{{- define "seamark.nats.servers" -}}
{{- $name := include "seamark.nats.name" .root -}}
{{- $servers := list -}}
{{- range $number := until (int .root.Values.nats.config.cluster.replicas) -}}
{{- $servers = append $servers (printf "%s://%s-%d.%s-headless:%v" $.scheme $name $number $name $.port) -}}
{{- end -}}
{{- join "," $servers -}}
{{- end }}

{{- define "seamark.nats.urls" -}}
{{- if .Values.nats.enabled }}{{ include "seamark.nats.servers" (dict "root" . "scheme" "nats" "port" 4222) }}{{ else }}{{ join "," .Values.externalNats.urls }}{{ end }}
{{- end }}

{{- define "seamark.nats.monitors" -}}
{{- if .Values.nats.enabled }}{{ include "seamark.nats.servers" (dict "root" . "scheme" "http" "port" 8222) }}{{ else }}{{ join "," .Values.externalNats.monitorUrls }}{{ end }}
{{- end }}
