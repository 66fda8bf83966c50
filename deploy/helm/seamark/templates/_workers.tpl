{{/* Deployments of workers: name -> channel ("": all), replicas, resources, tag: as of roles.worker, but for what the channel says. */}}
{{- define "seamark.workers" -}}
{{- $worker := .Values.roles.worker }}
{{- $all := omit $worker "enabled" "channels" }}
{{- if not $worker.enabled }}
{}
{{- else if $worker.channels }}
{{- range $channel, $own := $worker.channels }}
{{ printf "worker-%s" $channel }}:
  {{- merge (dict "channel" $channel) ($own | default dict | deepCopy) (deepCopy $all) | toYaml | nindent 2 }}
{{- end }}
{{- else }}
worker:
  {{- merge (dict "channel" "") (deepCopy $all) | toYaml | nindent 2 }}
{{- end }}
{{- end }}

{{/* Deployments of all roles: name -> role, channel, replicas, resources, tag. */}}
{{- define "seamark.deployments" -}}
{{- range $role, $told := omit .Values.roles "worker" }}
{{- if $told.enabled }}
{{ $role }}:
  {{- merge (dict "role" $role "channel" "") (omit $told "enabled") | toYaml | nindent 2 }}
{{- end }}
{{- end }}
{{- range $name, $told := include "seamark.workers" . | fromYaml }}
{{ $name }}:
  {{- merge (dict "role" "worker") $told | toYaml | nindent 2 }}
{{- end }}
{{- end }}

{{/* The Secret that a role's providers are read from; empty: none. (root, role) */}}
{{- define "seamark.providersSecret" -}}
{{- if eq .role "worker" }}{{ .root.Values.sending.providersSecret }}{{ else if eq .role "gateway" }}{{ .root.Values.sending.callbacksSecret }}{{ end }}
{{- end }}

{{/* What workers and gateways are told of sending. (root, role) */}}
{{- define "seamark.sendingEnv" -}}
{{- if include "seamark.providersSecret" . }}
- {name: SEAMARK_PROVIDERS, value: /etc/seamark/providers/providers.toml}
{{- end }}
{{- if .root.Values.sending.unsubscribeSecret }}
- {name: SEAMARK_UNSUBSCRIBE_SECRETS_FILE, value: /etc/seamark/secrets/unsubscribe-secrets}
{{- end }}
{{- if .root.Values.sending.storageKeysSecret }}
- {name: SEAMARK_STORAGE_KEYS_FILE, value: /etc/seamark/secrets/storage-keys}
{{- end }}
{{- if eq .role "worker" }}
- {name: SEAMARK_PUBLIC_URL, value: {{ .root.Values.sending.publicUrl | quote }}}
{{- end }}
{{- end }}
